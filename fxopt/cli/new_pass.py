"""`fxopt new-pass`: a plugin project that is installed, found and tested as it stands, to be filled with one's own."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.console import UserError, console

#: template -> the file that it becomes
FILES = {
    "pyproject.toml.j2": "pyproject.toml",
    "README.md.j2": "README.md",
    "init.py.j2": "src/{package}/__init__.py",
    "op.py.j2": "src/{package}/op.py",
    "fusion.py.j2": "src/{package}/fusion.py",
    "test.py.j2": "tests/test_{name}.py",
}


def new_pass(
    name: Annotated[str, typer.Argument(help="The fusion's name, such as soft_cap: letters, digits, underscores.")],
    directory: Annotated[Path | None, typer.Option(help="Where to write it (default: ./fxopt-NAME).")] = None,
) -> int:
    """Write a plugin project with a fusion, its op and their tests."""
    name = checked(name)
    root = (directory or Path(f"fxopt-{name.replace('_', '-')}")).expanduser()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists already: give another name, or an empty directory with --directory")
    try:
        for path, content in project(name).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write to {root}: {error.strerror or error}") from None
    out = console()
    out.print(f"written: {root}", markup=False, soft_wrap=True)
    out.print(f"next: pip install --no-build-isolation -e {root} && pytest {root}", markup=False, soft_wrap=True)
    return 0


def checked(name: str) -> str:
    """The name, if a module, an op and an entry point can bear it. Raises UserError otherwise."""
    from fxopt.rewrite.fusion import name_of
    from fxopt.rewrite.plugins import fusions

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} can't name a module: use lower-case letters, digits and underscores, as in soft_cap")
    if (own := name_of(class_of(name))) != name:
        raise UserError(f"the class {class_of(name)} would be called {own!r} in reports, not {name!r}: use that name")
    if name in fusions():
        raise UserError(f"there is a fusion {name!r} already (see fxopt passes): give yours another name")
    return name


def class_of(name: str) -> str:
    """The class of the fusion that is called `name`."""
    return "Fuse" + "".join(part.capitalize() for part in name.split("_"))


def project(name: str) -> dict[str, str]:
    """The files of the project, by their paths in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("fxopt.cli", "templates"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    names = {
        "name": name,
        "package": f"fxopt_{name}",
        "distribution": f"fxopt-{name.replace('_', '-')}",
        "fusion": class_of(name),
    }
    return {path.format(**names): templates.get_template(file).render(names) for file, path in FILES.items()}
