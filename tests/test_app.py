"""The command app.py: what it refuses before it serves."""

import socket
from pathlib import Path

import pytest

import app
from web.page import Page


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        app.main(list(argv))
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    return error


def test_a_port_in_use_is_named(model: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(capsys, "--model", str(model), "--port", str(port))
    assert f"cannot listen at 127.0.0.1, port {port}" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--port", "0"], "must be at least 1"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--device", "abacus", "--port", "7999"], "this machine has no device abacus"),
        (["--share"], "--share"),
    ],
)
def test_bad_flags_end_in_one_line(capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    assert message in refused(capsys, *flags)


def test_the_models_in_the_box_are_offered() -> None:
    assert all((path / "model_index.json").is_file() for path in app.MODELS)


def test_the_page_sends_nothing_to_others(tmp_path: Path) -> None:
    page = Page([str(app.MODELS[-1])], tmp_path, tmp_path, "cpu").build()
    assert not page.analytics_enabled
    assert "fonts.googleapis" not in str(page.get_config_file())
