"""Builds the native library into wheels and editable installs, where there is a C compiler."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuild(BuildHookInterface):
    """Compile `syncnorm/native`; without a compiler the wheel is one for any machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = self._load_build()
        try:
            build.build()
        except build.BuildError as error:
            self.app.display_warning(f"without the native library: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append("/syncnorm/native/*.so")

    def _load_build(self) -> Any:
        path = Path(self.root) / "syncnorm" / "native" / "build.py"
        spec = importlib.util.spec_from_file_location("syncnorm_native_build", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
