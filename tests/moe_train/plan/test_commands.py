"""The verbs of `moe-train plan`: help that teaches, no torch, and hardware whose every number has a
source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.plan.hardware import Constant, load_hardware

ROOT = Path(__file__).parents[3]
VERBS = ["compute-optimal", "fit", "sweep", "memory", "layout", "cost", "upcycle"]


def test_help_names_every_verb(capsys) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS) and "..." not in text.split("Commands:")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_an_example_and_speaks_json(verb: str, capsys) -> None:
    assert main(["plan", verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n  moe-train plan {verb} " in text and "--json" in text and "\\b" not in text


def test_neither_torch_nor_megatron_is_needed(tmp_path: Path) -> None:
    """With both made impossible to import, as on a login node."""
    program = f"""
import sys
sys.modules["torch"] = sys.modules["megatron"] = None
from moe_train.cli import main
for command in (
    ["compute-optimal", "--flops", "1e21"],
    ["memory", "jetmoe_8b"],
    ["layout", "jetmoe_8b"],
    ["cost", "jetmoe_8b"],
    ["upcycle", "--dense-tokens", "1T", "--moe-tokens", "1T"],
    ["sweep", "1e14", "--base", "demo", "--out", {str(tmp_path / "sw")!r}, "--sizes", "2", "--around", "1M"],
    ["fit", "tests/moe_train/plan/chinchilla_points.csv", "--bootstraps", "0", "--starts", "1"],
):
    assert main(["plan", *command]) == 0, command
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_constant_of_the_hardware_has_a_source() -> None:
    hardware = load_hardware("h100")
    constants = {name: value for name, value in hardware if isinstance(value, Constant)}
    assert len(constants) == 11 and all(len(constant.source) > 20 for constant in constants.values())
    assert hardware.bandwidth(8) > hardware.bandwidth(9)


def test_a_hardware_file_of_one_s_own(tmp_path: Path, capsys) -> None:
    text = (ROOT / "configs/hardware/h100.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("name: h100", "name: mine"), encoding="utf-8")
    assert main(["plan", "cost", "jetmoe_8b", "--gpu", str(mine)]) == 0
    assert "96 mine" in capsys.readouterr().out
    mine.write_text(text.replace("value: 80.0", "value: -80.0"), encoding="utf-8")
    assert main(["plan", "cost", "jetmoe_8b", "--gpu", str(mine)]) == 2
    assert "memory_gb" in capsys.readouterr().err
