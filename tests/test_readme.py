"""README.md and docs/ hold what they say: commands exist, links lead somewhere, names are those of the code, examples run."""

import importlib.util
import inspect
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from worldmodel.tools.cli import commands, main, parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = {".gif", ".png", ".jpg", ".svg"}
# what a command of the README is given on top here, so that it takes seconds
TINY = {
    "synth": "--logs 1 --seconds 2.4 --every 2",
    "pretrain": "--config tiny --set train.steps=3 train.threads=1 train.autocast=off train.channels_last=off",
    "evaluate": "--max-clips 1 --methods model,evidence_only,accumulate_nearest",
    "forecast": "--rays 500",
    "finetune": "--seeds 1 --steps 4",
}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shell_lines(page):
    return [words for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def wm_lines(page):
    """Arguments of every `wm ...` line of the page's shell blocks, fenced or indented, up to a redirection."""
    lines = [words[1:] for words in shell_lines(page) if words[0].rpartition("/")[2] == "wm"]
    lines += [shlex.split(line, comments=True) for line in re.findall(r"^    wm (.*)", prose(page), re.MULTILINE)]
    return [words[: words.index(">")] if ">" in words else words for words in lines]


def flags_of(command):
    rows = next(action for action in parser()._actions if hasattr(action, "choices") and action.choices and command in action.choices)
    return set(rows.choices[command]._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse_without_abbreviations(page):
    for words in wm_lines(page):
        assert words[0] in commands(), f"{page.name}: wm {words[0]} is no command"
        written = {word.split("=", 1)[0] for word in words if word.startswith("-")}
        assert written <= flags_of(words[0]), f"{page.name}: wm {' '.join(words)}: {written - flags_of(words[0])}"
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: wm {' '.join(words)}: not accepted")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_named_in_the_text_exist(page):
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        if match := re.match(r"wm ([a-z]+)\b(.*)", span):
            assert match[1] in commands(), f"{page.name}: `{span}`"
            assert set(re.findall(r"(?<!\S)--[a-z-]+", match[2])) <= flags_of(match[1]), f"{page.name}: `{span}`"
        elif match := re.match(r"(--[a-z-]+)", span):
            assert any(match[1] in flags_of(command) for command in commands()), f"{page.name}: `{span}`"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {words[1] for words in shell_lines(ROOT / "README.md") if words[0] == "make"}
    asked |= set(re.findall(r"`(?:[A-Z_]+=\S+ )?make ([a-z-]+)`", prose(ROOT / "README.md")))
    assert {"demo", "test"} <= asked <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path = page.parent / target.partition("#")[0]
        if not path.exists():
            missing.append(path)
    assert not [path for path in missing if path.suffix not in PICTURES]
    if missing:
        pytest.skip(f"no picture yet: {', '.join(path.name for path in missing)}")


def test_files_named_in_the_text_exist():
    for page in PAGES:
        for span in re.findall(r"`([a-z_]+/[A-Za-z_/]+\.(?:py|yaml|md))`", prose(page)):
            assert (ROOT / span).is_file(), f"{page.name}: `{span}`"


def test_everything_there_is_to_choose_is_described():
    from sensors.adapters.base import adapters
    from worldmodel.config import load_config
    from worldmodel.evaluate import HIDDEN, PROTOCOLS, baselines
    from worldmodel.metrics import METRICS
    from worldmodel.subsets import SUBSETS
    from worldmodel.trained import Trained

    for page, names in (
        ("README.md", {*adapters(), *load_config().objectives, "synthetic"}),
        ("docs/EVALUATION.md", {*baselines(), *Trained.arms, *PROTOCOLS, *SUBSETS, HIDDEN, *METRICS}),
    ):
        text = (ROOT / page).read_text()
        assert not [name for name in names if name not in text], page
    counted = re.search(r"beside (\w+) baselines", (ROOT / "README.md").read_text())
    assert counted and counted[1] == {5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}[len(baselines())]


def test_the_table_of_results_is_whole():
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- results:begin -->\n(.*?)\n<!-- results:end -->", text, re.DOTALL)
    assert table
    rows = [line.strip("|").split("|") for line in table[1].splitlines() if line.startswith("|")]
    assert len(rows) >= 2 and all(len(row) == len(rows[0]) for row in rows)


# --- examples --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """A function that imports the Python block of a page as a module of the given name."""

    def imported(page, name):
        (block,) = blocks(ROOT / page, "python")
        (tmp_path / "modules").mkdir(exist_ok=True)
        path = tmp_path / "modules" / f"{name}.py"
        path.write_text(block)
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return imported


def contract_tests():
    """The tests of adapters, as plain functions of (name, source, log, tmp_path)."""
    spec = importlib.util.spec_from_file_location("adapter_contract", ROOT / "tests" / "contract" / "test_adapters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {"name", "source", "log", "tmp_path"}
    found = {name: test for name, test in vars(module).items() if name.startswith("test_") and set(inspect.signature(test).parameters) <= given}
    return module, found


@pytest.fixture
def fleet(module_of, monkeypatch):
    """The example of ADAPTERS.md, announced as another distribution would."""
    from sensors.adapters import base

    module = module_of("docs/ADAPTERS.md", "fleet")
    entry = type("Entry", (), {"name": "fleet", "load": staticmethod(lambda: module)})
    monkeypatch.setattr(base, "entry_points", lambda group: [entry] if group == base.GROUP else [])
    return module


def test_the_example_of_an_adapter_keeps_the_contract(fleet, tmp_path):
    from sensors.adapters.base import adapters, open_source

    contract, tests = contract_tests()
    contract.ADAPTERS.update(adapters())
    assert len(tests) > 8
    for name, test in tests.items():
        folder = tmp_path / name
        (folder / "sample").mkdir(parents=True)
        source = fleet.write_sample(folder / "sample")
        (folder / "empty").mkdir()
        given = {"name": "fleet", "source": source, "log": next(iter(open_source(source))), "tmp_path": folder / "empty"}
        test(**{key: given[key] for key in inspect.signature(test).parameters})


def test_the_example_of_an_adapter_says_which_file_is_wrong(fleet, tmp_path):
    from sensors.errors import WmError

    source = fleet.write_sample(tmp_path)
    (source / "drive-1" / "poses.csv").write_text("1.5e9,1,2\n")
    with pytest.raises(WmError, match=r"drive-1: poses\.csv has 1 lines"):
        next(fleet.open_logs(source, {}))


def test_the_example_of_an_adapter_is_ingested(fleet, tmp_path):
    from sensors.formats.detections import class_of
    from sensors.formats.images import decode
    from sensors.ingest import ingest
    from sensors.store.reader import open_store

    report = ingest([fleet.write_sample(tmp_path)], tmp_path.parent / f"{tmp_path.name}-store")
    assert (report.seen, report.stored, report.items, report.exit_code) == (1, 1, 7, 0)
    log = open_store(tmp_path.parent / f"{tmp_path.name}-store").open_log("fleet/drive-1")
    assert decode(log.read_image("front", 3)).shape == (400, 640, 3) and not [what for what in log.counts if what.startswith("labels")]
    assert [(box.track, class_of(box.category)) for box in log.open_labels().boxes] == [("17", "car")]
    assert log.poses.source == "gnss" and len(log.read_sweep("top", 0).points) == 480


def own_data():
    """The commands of the section on own data."""
    section = (ROOT / "README.md").read_text().partition("## Your own data")[2].partition("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for block in found for line in block.splitlines()]


def call(words):
    """Run a command as given, small."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main([*words, *TINY.get(words[0], "").split()]) == 0, f"wm {' '.join(words)}"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recordings that the README makes."""
    root = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words in own_data():
            if words[0] == "synth":
                call(words)
    return root


@pytest.mark.slow
def test_own_data_goes_through_as_the_readme_says(folder, monkeypatch, capsys):
    """Every command in order, then the snippet of the library section, in a folder that holds nothing but recordings."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(folder)
    lines = [words for words in own_data() if words[0] != "synth"]
    assert [words[0] for words in lines] == ["check", "ingest", "ingest", "pretrain", "evaluate", "forecast", "export", "verify", "finetune"]
    said = {}
    for words in lines:
        call(words)
        said[" ".join(words)] = capsys.readouterr().out
    for made in ("check.html", "store/store.json", "test-store/store.json", "runs/mine/checkpoints/latest", "encoder/encoder.py"):
        assert Path(made).is_file(), made
    assert list(Path("runs/mine/forecasts").rglob("forecast.gif"))
    assert "1 stored + 0 quarantined" in said["ingest recordings store --poses refined"]
    assert "everything arrived" in said["verify encoder"]
    table = next(text for line, text in said.items() if line.startswith("evaluate"))
    assert all(name in table for name in ("model", "evidence_only", "accumulate_nearest"))

    forecasting, training = blocks(ROOT / "README.md", "python")
    exec(compile(forecasting, "README.md", "exec"), {})
    horizons = re.findall(r"^(\d\.\d) s: \d+\.\d\d m over \d+ rays$", capsys.readouterr().out, re.MULTILINE)
    assert horizons == ["0.2", "0.4", "0.6", "0.8", "1.0"]

    lines = training.partition("import worldmodel\n")[2].strip().splitlines()
    assert len(lines) <= 10
    made = {}
    exec(compile(training, "README.md", "exec"), made)
    assert len(made["levels"]) == len(made["encoder"].out_indices) and made["loss"].item() > 0


@pytest.mark.slow
def test_the_example_of_an_encoder_trains(folder, module_of, tmp_path, monkeypatch):
    import worldmodel
    from sensors.ingest import ingest

    module_of("docs/ENCODERS.md", "my_encoder")
    monkeypatch.chdir(tmp_path)
    ingest([folder / "recordings"], tmp_path / "store")
    (line,) = wm_lines(ROOT / "docs" / "ENCODERS.md")
    call([*line, "-o", "run"])
    assert type(worldmodel.load("run").model.encoder).__name__ == "Heights"
