"""docs/compatibility.md says what the tests of tools show, no more and no less."""

import compatibility
import pytest


@pytest.fixture(scope="module")
def rows():
    found, skipped = compatibility.found()
    if skipped:
        pytest.skip(f"not every test can be collected here: {skipped}")
    return found


def test_the_page_agrees_with_the_tests(rows):
    written = compatibility.without_versions(compatibility.PAGE.read_text())
    assert written == compatibility.without_versions(compatibility.page(rows)), "run python tests/compatibility.py"


def test_the_page_was_written_where_every_package_is_installed():
    page = compatibility.PAGE.read_text()
    assert compatibility.NOT_INSTALLED not in page
    assert page.count("| torch 2.") > 10


def test_a_changed_row_is_noticed(rows):
    changed = [rows[0]._replace(result="refused" if rows[0].result == "works" else "works"), *rows[1:]]
    assert compatibility.without_versions(compatibility.page(changed)) != compatibility.without_versions(
        compatibility.page(rows)
    )
