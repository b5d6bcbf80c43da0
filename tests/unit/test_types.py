"""The package's types are complete, and a strictly checked program can use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
USE = Path(__file__).with_name("typed_use.py")
# Its bases are mmengine's, which have no types.
UNTYPED = ("syncnorm.integrations.mmengine.",)


def check(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run basedpyright in a folder without the repository's settings, on the tree's package."""
    binaries = Path(sys.executable).parent
    # It asks the first `python` of PATH where packages are, whatever its options say.
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(binaries / "basedpyright"), "--outputjson", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def strictly(folder: Path, **programs: str) -> dict[str, list[str]]:
    """What strict mode says about each program."""
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    said: dict[str, list[str]] = {name: [] for name in programs}
    for each in check(folder, *(f"{name}.py" for name in programs))["generalDiagnostics"]:
        line = each["range"]["start"]["line"] + 1
        said[Path(each["file"]).stem].append(f"{line}: {each['message']}")
    return said


def test_every_public_type_is_known(tmp_path):
    said = check(tmp_path, "--verifytypes", "syncnorm", "--ignoreexternal")["typeCompleteness"]
    assert Path(said["packageRootDirectory"]) == ROOT / "syncnorm"
    assert len(said["symbols"]) > 3000
    vague = [
        f"{symbol['name']}: {each['message']}"
        for symbol in said["symbols"]
        if not symbol["isTypeKnown"] and not symbol["name"].startswith(UNTYPED)
        for each in symbol["diagnostics"]
        if each["severity"] == "error"
    ]
    # A name without an annotation: annotate it where the class begins.
    assert not vague, "\n".join(vague)


def test_a_program_in_strict_mode_can_use_them_and_a_lost_type_is_found(tmp_path):
    text = USE.read_text()
    lost = text.replace("convert(Net())", "nn.Module.train(Net())", 1)
    said = strictly(tmp_path, whole=text, lost=lost)
    assert said["whole"] == []
    assert "Net" in "\n".join(said["lost"])
