"""Every sabotage of the product is caught by the check that is meant to catch it."""

from __future__ import annotations

import re

import pytest
import sabotage
import servers


@pytest.mark.summary
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("in_the_background")
def test_every_sabotage_is_caught() -> None:
    results = sabotage.run_all()
    survived = [result.sabotage.name for result in results if not result.caught and not missing(result.sabotage)]
    assert survived == []
    assert sum(bool(result.caught) for result in results) >= 20


def missing(chosen: sabotage.Sabotage) -> bool:
    """Whether the server that its test needs cannot be started here."""
    return any(name in chosen.check and servers.available(name) for name in ("postgresql", "mariadb"))


SOURCE = """
class A:
    RULE = "a = 1"

    def f(self, x):
        if x and (x > 1 or
                  x < 3):
            return 1
        return 2
    def g(self): return 1

class B:
    def g(self): return 2
"""


@pytest.mark.parametrize(
    ("where", "edit", "new"),
    [
        ("A.f", sabotage.never("x < 3"), "if x and (x > 1 or\n                  False):"),
        ("f", sabotage.always("x > 1 or"), "if x and (True):"),
        ("f", sabotage.drop("return 2", "return 3"), "        return 3\n"),
        ("f", sabotage.begin("return 0"), "        return 0\n        if x and"),
        ("f", sabotage.text("or x < 3", ""), "(x > 1 ):"),
        ("A.RULE", sabotage.text("a=1", "a = 2"), 'RULE = "a = 2"'),
    ],
)
def test_a_sabotage_changes_one_place_whatever_stands_around_it(where: str, edit: sabotage.Edit, new: str) -> None:
    made = sabotage.changed(sabotage.Sabotage("x", where, edit, "y"), SOURCE)
    assert new in made
    assert new not in SOURCE


@pytest.mark.parametrize(
    ("where", "edit", "why"),
    [
        ("h", sabotage.begin("return"), "0 functions or attributes are named h"),
        ("g", sabotage.begin("return"), "2 functions or attributes are named g"),
        ("f", sabotage.text("x > 5", ""), "'x > 5' is there 0 times"),
        ("f", sabotage.text("x", "y"), "'x' is there 4 times"),
        ("f", sabotage.never("x > 5"), "0 places have 'x > 5'"),
        ("f", sabotage.never("x"), "3 places have 'x'"),
        ("f", sabotage.drop("return"), "2 places have 'return'"),
    ],
)
def test_a_sabotage_that_finds_no_place_or_several_is_an_error(where: str, edit: sabotage.Edit, why: str) -> None:
    with pytest.raises(LookupError, match=f"^mine: .*{re.escape(why)}"):
        sabotage.changed(sabotage.Sabotage("mine", where, edit, "y"), SOURCE)


def test_each_sabotage_has_its_place_in_the_source() -> None:
    source = sabotage.SOURCE.read_text(encoding="utf-8")
    for each in sabotage.SABOTAGES:
        sabotage.changed(each, source)


def test_the_source_itself_passes_what_the_sabotages_fail() -> None:
    """A check that fails anyway would catch everything."""
    nothing = sabotage.SABOTAGES[0]._replace(edit=sabotage.begin("pass"))
    assert sabotage.tried(nothing, sabotage.SOURCE.read_text(encoding="utf-8"), ticks=5_000).caught == ""
