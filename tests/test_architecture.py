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


@pytest.mark.parametrize("wrong", [
    "model.rate_hz=0", "model.rate_hz=-5", "model.rate_hz=.inf", "train.threads=0", "train.every_s=0", "train.every_s=1e-12", "train.clips=0",
    "train.steps=-1", "train.steps=0", "train.validate_every=0", "train.save_every=0", "train.rays=0", "train.instants=0", "train.lr=0",
    "train.lr=.inf", "train.clip_norm=-1", "train.hidden_share=1.5", "train.validation=-0.1", "train.validation=1", "train.scale=1",
    "train.cache_gb=-1", "train.warmup=-1", "model.latent_sweeps=[1,2]", "model.latent_sweeps=[0,2,1]", "model.latent_sweeps=[0,0]",
    "model.past=0", "model.future=-2", "model.past=3", "model.latent_sweeps=[]", "model.latent_sweeps=[-1]", "model.channels=0",
    "model.channels=6", "encoder.layers=[]", "encoder.pfn_widths=[]", "encoder.pfn_widths=[0]", "encoder.low=[]", "encoder.high=[.inf,51.2,3]",
    "encoder.voxel=[0,0.4,6]", "encoder.strides=[0,2,2]", "encoder.max_points=-1", "seed=-1", "objectives.moving=-1", "objectives.moving=.inf",
    "train.steps=1" + 400 * "0", "encoder.features=[x,y,z,dt,dt]", "encoder.pfn_widths=[15,16]",
    "encoder.padded_slots=true",
])  # fmt: skip
def test_a_number_that_cannot_be_is_refused_with_its_key(wrong):
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    key = "model.latent_sweeps" if wrong == "model.past=3" else wrong.partition("=")[0]  # the sweeps are too many for the past
    with pytest.raises(UsageError, match=f"^default: {key}: ") as said:
        load_config("default", [wrong])
    assert "\n" not in str(said.value) and len(str(said.value)) < 200


@pytest.mark.parametrize("wrong", ["encoder.low=[0,0]", "encoder.voxel=[1000,1000,6]", "train.lr=1" + 400 * "0", "train.steps=2020-13-45",
                                   "train={1: 2}", "train.steps=[" + 5000 * "["])  # fmt: skip
def test_a_value_of_another_kind_is_one_line(wrong):
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    with pytest.raises(UsageError) as said:
        load_config("default", [wrong])
    assert "\n" not in str(said.value)


def test_every_number_of_the_configuration_has_bounds():
    import dataclasses

    from worldmodel.config import BOUNDS_OF, load_config

    config = load_config()
    sections = [("", config), *((f"{name}.", getattr(config, name)) for name in ("encoder", "model", "train"))]
    numbers = {path + field.name for path, section in sections for field in dataclasses.fields(section)
               if any(kind in str(field.type) for kind in ("int", "float"))}  # fmt: skip
    assert numbers == set(BOUNDS_OF)


def test_blocks_whose_maps_would_differ_are_refused():
    from sensors.errors import UsageError
    from worldmodel.config import load_config
    from worldmodel.encoders.contract import build_encoder

    for wrong in ("encoder.strides=[3,2,2]", "encoder.upsample_strides=[0.3,2,4]"):
        with pytest.raises(UsageError, match="the blocks have to give one size"):
            build_encoder(load_config("tiny", [wrong]).encoder)


def test_a_configuration_that_is_no_text_is_named(tmp_path):
    from sensors.errors import UsageError
    from worldmodel.config import load_config

    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match=r"mine\.yaml: not readable as YAML"):
        load_config(str(tmp_path / "mine.yaml"))


def test_no_file_of_the_project_is_named_after_nothing():
    assert not [p for p in FILES if p.stem in {"utils", "util", "helpers", "helper", "common", "misc"}]
