"""The commands that need no model: help, version, passes, doctor."""

import subprocess
import sys

import pytest

from fxopt.cli import run


def test_help_imports_no_torch():
    program = "import sys; from fxopt.cli import run; run(['demo', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--backends" in done.stdout


def test_no_command_shows_the_help(capsys):
    assert run([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "fxopt", "--version"], capture_output=True, text=True)
    import fxopt

    assert done.stdout == f"fxopt {fxopt.__version__}\n"


def test_passes_lists_every_fusion_with_its_file(capsys):
    from fxopt.rewrite.plugins import registered

    assert run(["passes"]) == 0
    shown = capsys.readouterr().out
    for item in registered():
        assert item.fusion.name in shown
    assert "rms_norm.py:" in shown


def test_doctor_is_content(capsys):
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "!!" not in shown
    assert "registered" in shown


def test_doctor_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("fxopt.cli.doctor._version", lambda name: None)
    assert run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "pip install torch" in shown
    assert "!!" in shown


def test_doctor_survives_a_check_that_fails(monkeypatch, capsys):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr("fxopt.cli.doctor.CHECKS", (broken,))
    assert run(["doctor"]) == 1
    assert "no such thing" in capsys.readouterr().out


@pytest.mark.parametrize("text, shown", [("short", "short"), ("two\nlines", "two lines"), ("x" * 30, "x" * 17 + "...")])
def test_elide(text, shown):
    from fxopt.cli.demo import elide

    assert elide(text, 20) == shown
