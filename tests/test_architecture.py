"""The layers, the import budget, the configurations: what has to stay true of the tree as a whole. Files are parsed, not run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in ("sensors", "worldmodel", "tools", "configs") for p in (ROOT / folder).rglob("*.py"))
PLUGINS = ("sensors/adapters", "sensors/kernels", "worldmodel/objectives", "worldmodel/baselines", "worldmodel/downstream", "worldmodel/export",
           "worldmodel/heads")  # fmt: skip


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Dotted names that a file imports: the modules, and what `from` takes out of them."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "sensors")], ids=name_of)
def test_sensors_stand_alone(path):
    assert not roots(imports(path)) & {"torch", "worldmodel", "tools"}


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "worldmodel")], ids=name_of)
def test_the_world_model_knows_no_command(path):
    if path.name == "__main__.py":
        return
    assert not {name for name in imports(path) if name.startswith(("worldmodel.tools", "tools"))}


@pytest.mark.parametrize("name", ["records.py", "errors.py", "geometry.py", "files.py"])
def test_the_lowest_layer_knows_only_itself(name):
    own = {n for n in imports(ROOT / "sensors" / name) if n.startswith("sensors.")}
    assert all(n.split(".")[1] in {"records", "errors", "geometry", "files"} for n in own)


@pytest.mark.parametrize("folder", PLUGINS)
def test_siblings_do_not_know_each_other(folder):
    package = folder.replace("/", ".")
    for path in (ROOT / folder).glob("*.py"):
        siblings = {p.stem for p in (ROOT / folder).glob("*.py")} - {path.stem, "base", "__init__"}
        known = {name.removeprefix(package + ".").split(".")[0] for name in imports(path) if name.startswith(package + ".")}
        assert not known & siblings, f"{path}: imports {known & siblings}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_packages_are_empty(path):
    if path == ROOT / "worldmodel" / "__init__.py":
        assert not roots(imports(path, top_only=True)) - {"__future__", "typing"}
    else:
        assert path.read_text().strip() == ""


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "tools")], ids=name_of)
def test_commands_import_what_is_heavy_when_they_run(path):
    assert not roots(imports(path, top_only=True)) & {"torch", "numpy", "numba", "open3d", "cv2", "scipy", "matplotlib", "pyarrow"}


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom worldmodel.tools.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'open3d', 'numba', 'cv2', 'numpy', 'scipy', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_every_configuration_loads():
    from worldmodel.config import load_config, overlays

    assert {"default", "tiny", "openpcdet_kitti"} <= set(overlays())
    for name in overlays():
        config = load_config(name)
        assert config.name == name and config.encoder.grid[0] > 0


def test_a_wrong_key_is_refused_with_the_nearest():
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    with pytest.raises(UsageError, match="did you mean lr"):
        load_config("default", ["train.lrr=1"])
    with pytest.raises(UsageError, match=r"train\.steps"):
        load_config("default", ["train.steps=many"])
    with pytest.raises(UsageError, match="more than"):
        load_config("default", ["encoder.voxel=[0.001, 0.001, 6.0]"])


@pytest.mark.parametrize("wrong", ["model.rate_hz=0", "model.rate_hz=-5", "model.rate_hz=.inf", "train.threads=0", "train.every_s=0"])
def test_a_number_that_cannot_be_is_refused_with_its_key(wrong):
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    with pytest.raises(UsageError, match=f"^default: {wrong.partition('=')[0]}: "):
        load_config("default", [wrong])


def test_a_configuration_that_is_no_text_is_named(tmp_path):
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match=r"mine\.yaml: not readable as YAML"):
        load_config(str(tmp_path / "mine.yaml"))


def test_no_file_of_the_project_is_named_after_nothing():
    assert not [p for p in FILES if p.stem in {"utils", "util", "helpers", "helper", "common", "misc"}]
