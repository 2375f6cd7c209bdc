"""`wm demo`: what it refuses, before it spends minutes on it."""

import pytest

from worldmodel.tools.cli import main


@pytest.mark.parametrize(
    ("asked", "says"), [(["--streets", "0"], "at least 1"), (["--config", "nope"], "nope"), (["--logs", "nowhere"], "nowhere: does not exist")]
)
def test_nothing_is_begun_that_cannot_be_ended(tmp_path, asked, says, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo"), *asked]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").write_text("")
    assert main(["demo", "-o", str(tmp_path / "store"), "--streets", "1"]) == 2
    assert "is there already" in capsys.readouterr().err and [path.name for path in (tmp_path / "store").iterdir()] == ["mine"]
