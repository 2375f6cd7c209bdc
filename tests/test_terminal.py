"""What the commands print: tables and progress."""

from types import SimpleNamespace

from worldmodel.tools import terminal


def test_rate_and_time_left_are_of_what_was_counted(monkeypatch, capsys):
    """A resumed command finds 500 of 1000 done, prepares for a minute, and then does one in two seconds."""
    now = [1000.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    report = terminal.reporter("step")
    report(500, 1000, "preparing")
    now[0] = 1060.0
    report(500, 1000, "preparing still")
    now[0] = 1080.0
    report(510, 1000, "loss 0.1")
    now[0] = 2060.0
    report(1000, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "step: 500/1000, starting  preparing",
        "step: 500/1000, starting  preparing still",
        "step: 510/1000, 0.50/s, 980 s left  loss 0.1",
        "step: 1000 in 1060.0 s",
    ]


def test_a_terminal_narrower_than_a_table_leaves_nothing_out(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    columns, row = [f"column {i}" for i in range(12)], [f"0.123 / 0.456 / {i}" for i in range(12)]
    terminal.print_table("title", columns, [row])
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in [*columns, *row]) and len(printed.splitlines()) == 4
