"""Every sabotage of the product is caught by the check that is meant to catch it."""

from __future__ import annotations

import pytest
import sabotage
import servers


@pytest.mark.summary
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_sabotage_is_caught() -> None:
    results = sabotage.run_all()
    survived = [result.sabotage.name for result in results if not result.caught and not missing(result.sabotage)]
    assert survived == []
    assert sum(bool(result.caught) for result in results) >= 20


def missing(chosen: sabotage.Sabotage) -> bool:
    """Whether the server that its test needs cannot be started here."""
    return any(name in chosen.check and servers.available(name) for name in ("postgresql", "mariadb"))


def test_a_sabotage_that_finds_no_place_is_an_error() -> None:
    with pytest.raises(LookupError, match="not there any more"):
        sabotage.changed(sabotage.Sabotage("x", "no such text in the source", "", "y"), "source")
    with pytest.raises(LookupError, match="2 times"):
        sabotage.changed(sabotage.Sabotage("x", "a", "b", "y"), "a a")


def test_the_source_itself_passes_what_the_sabotages_fail() -> None:
    """A check that fails anyway would catch everything."""
    nothing = sabotage.SABOTAGES[0]._replace(new=sabotage.SABOTAGES[0].old)
    assert sabotage.tried(nothing, sabotage.SOURCE.read_text(encoding="utf-8"), ticks=5_000).caught == ""
