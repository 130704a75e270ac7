"""What mkdocs does beyond its configuration: pages that are made, and links that lead out of the site."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import fusion_pages

from fxopt.cli import app

DOCS = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """List the fusions' pages in the navigation."""
    names = {stage: [f.name for f in fusion_pages.bundled() if f.stage == stage] for stage in ("fuse", "raise")}
    for section in config["nav"]:
        if isinstance(section, dict) and "Fusions" in section:
            section["Fusions"] += [f"fusions/{name}.md" for name in names["fuse"]]
            section["Fusions"].append({"Raising rules": [f"fusions/{name}.md" for name in names["raise"]]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Make a page for each bundled fusion."""
    measurements = (DOCS / "measurements.md").read_text(encoding="utf-8")
    tables: dict[str, list[str]] = {"fuse": [], "raise": []}
    for page in fusion_pages.pages(measurements):
        files.append(File.generated(config, f"fusions/{page.name}.md", content=page.markdown()))
        tables[page.stage].append(f"| [{page.name}]({page.name}.md) | `{page.headline}` |")
    lines = ["", "## Fusions", "", "| | |", "|---|---|", *tables["fuse"]]
    lines += ["", "## Raising rules", "", "They bring spelled-out forms back to one op, for fusions to find.", ""]
    _extend(files, config, "fusions/index.md", [*lines, "| | |", "|---|---|", *tables["raise"]])
    _extend(files, config, "reference/command-line.md", _commands())
    return files


def _extend(files: Files, config: Any, path: str, lines: list[str]) -> None:
    """Add lines to a page that is written by hand."""
    plain = files.get_file_from_path(path)
    assert plain is not None
    files.remove(plain)
    written = (DOCS / path).read_text(encoding="utf-8")
    files.append(File.generated(config, path, content="\n".join([written, *lines, ""])))


def _commands() -> list[str]:
    """What each command takes, read off the command line itself."""
    group: Any = typer.main.get_command(app)
    lines: list[str] = []
    context = typer.Context(group, info_name="fxopt")
    for name, command in group.commands.items():
        usage = " ".join(command.collect_usage_pieces(typer.Context(command, context, info_name=name)))
        lines += ["", f"## {name}", "", command.help, "", f"    fxopt {name} {usage}", "", "| | |", "|---|---|"]
        for given in command.params:
            names = given.opts if given.param_type_name == "option" else [given.name]
            words = " ".join((given.help or "").split())
            default = f" [`{given.default}`]" if isinstance(given.default, (str, int)) and given.default else ""
            lines.append(f"| {', '.join(f'`{each}`' for each in names)} | {words}{default} |")
    return lines


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show links to files outside of docs/ as names: they work where the repository is read, and not on the site."""
    here = (DOCS / page.file.src_uri).parent

    def name(link: re.Match[str]) -> str:
        target = (here / link[2].split("#")[0]).resolve()
        return link[1] if not target.is_relative_to(DOCS) else link[0]

    return re.sub(r"\[([^\]]+)\]\(((?!\w+:)[^)\s]*\.\./[^)\s]*)\)", name, markdown)
