"""Generated pages are up to date and links in the documentation lead somewhere."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_eso.cli.main import app
from tools.config_docs import OUT, render

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]


def test_the_configuration_page_is_generated_from_the_schema():
    assert OUT.read_text() == render(), "run `make docs`"


def test_links_to_files_exist():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, broken


@pytest.mark.parametrize("group", ["", "data", "checkpoint", "sweep", "config"])
def test_no_line_of_a_list_of_commands_is_cut_short(group):
    shown = CliRunner().invoke(app, [*group.split(), "--help"])
    _, head, commands = shown.output.partition("Commands:")
    assert head and "..." not in commands, commands


def test_links_to_headings_lead_to_one():
    broken = []
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
            if "://" not in target and heading not in anchors(
                page.parent / target if target else page
            ):
                broken.append(f"{page.name}: {target}#{heading}")
    assert not broken, broken


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_row_of_a_table_has_the_cells_of_its_head():
    wrong = []
    for page in PAGES:
        for block in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            rows = block.splitlines()
            cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
            wrong += [
                f"{page.name}: {row}" for row, n in zip(rows, cells, strict=True) if n != cells[0]
            ]
    assert not wrong, wrong


def test_no_page_or_file_says_todo():
    found = [
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("megatron_eso/**/*.py"), *ROOT.glob("docs/*.md")]
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())
    ]
    assert not found, found
