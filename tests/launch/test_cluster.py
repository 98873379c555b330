"""Cluster files: presets, defaults, and mistakes told with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.yaml_marks import YamlError
from launch.cluster import ClusterConfig, load_cluster
from moe_train.config_file import find_config
from parallel.cuda_settings import ALWAYS, TENSOR_PARALLEL


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_presets() -> None:
    pyxis, plain, local = (load_cluster(name) for name in ("h100_pyxis", "h100", "local"))
    assert pyxis.ranks_per_node == plain.ranks_per_node == 8 and pyxis.container and not plain.container
    assert local.ranks_per_node == 1 and local.gpus_per_node == 0
    assert local.env["OMP_NUM_THREADS"] == "1"
    # Ranks set these by the run's layout, unless they are set.
    assert not {setting.name for setting in (*ALWAYS, TENSOR_PARALLEL)} & {*pyxis.env, *plain.env}
    written = yaml.safe_load(find_config("h100_pyxis", "cluster", Path("/")).read_text())
    assert set(written) == set(ClusterConfig.model_fields)  # the reference


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("name: x\npartitoin: gpu\n", 2, "did you mean 'partition'?"),
        ("name: x\ngpus_per_node: 8\ntasks_per_node: 4\n", 3, "a rank has one GPU"),
        ("name: x\nlauncher: mpirun\n", 2, "'srun' or 'torchrun'"),
        ("name: x\naccount: 'a; rm -rf /'\n", 2, "cannot go into a batch script"),
        ('name: x\npartition: "gpu\\n#SBATCH --qos=high"\n', 2, "cannot go into a batch script"),
        ("name: x\ncontainer:\n  image: a.sqsh\n  mounts:\n    - /a\n    - b:/c\n", 6, "is not a mount"),
        ("name: x\nenv:\n  A-B: 1\n", 3, "is not the name of an environment variable"),
        ("name: x\nvenv: envs/moe\n", 2, "is not an absolute path"),
        ("name: x\nsbatch: [mail]\n", 2, "is not an option"),
        ("name: x\nwarning: soon\n", 2, "warning"),
        ("account: me\n", 1, "name: is missing"),
    ],
)
def test_mistakes_name_file_line_and_remedy(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(YamlError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_that_does_not_exist() -> None:
    with pytest.raises(Exception, match="did you mean 'h100_pyxis'") as caught:
        load_cluster("h100_pyxi")
    assert caught.value.exit_code == 2
