"""Generated pages are up to date and links in the documentation lead somewhere."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_eso.cli.main import app
from tools.config_docs import OUT, render

ROOT = Path(__file__).parent.parent


def test_the_configuration_page_is_generated_from_the_schema():
    assert OUT.read_text() == render(), "run `make docs`"


def test_links_to_files_exist():
    broken = []
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, broken


@pytest.mark.parametrize("group", ["", "data", "checkpoint", "sweep", "config"])
def test_no_line_of_a_list_of_commands_is_cut_short(group):
    shown = CliRunner().invoke(app, [*group.split(), "--help"])
    _, head, commands = shown.output.partition("Commands:")
    assert head and "..." not in commands, commands


def test_no_page_or_file_says_todo():
    found = [
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("megatron_eso/**/*.py"), *ROOT.glob("docs/*.md")]
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())
    ]
    assert not found, found
