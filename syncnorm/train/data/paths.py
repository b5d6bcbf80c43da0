"""The search for a data set's files under the folder that a configuration names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from syncnorm.errors import ConfigError


@dataclass(frozen=True)
class DataFiles:
    """The folders and names under which a data set's files may lie.

    Args:
        layouts: folders to look into, each with the files wanted there.
        suffixes: possible suffixes of a file's name.
        wanted: the files, in words.
        source: where to get them, in words.
    """

    layouts: Sequence[tuple[str, Sequence[str]]]
    suffixes: Sequence[str]
    wanted: str
    source: str

    def find(self, root: Path | None) -> list[Path]:
        """Find the files of the first complete layout, in its order.

        Raises:
            ConfigError: no layout is complete.
        """
        if root is None:
            raise self._refuse("null")
        fewest = None
        for folder, names in self.layouts:
            paths = {name: self._path(root / folder, name) for name in names}
            found = [path for path in paths.values() if path is not None]
            if len(found) == len(names):
                return found
            missing = [str(Path(folder, name)) for name, path in paths.items() if path is None]
            if found and (fewest is None or len(missing) < len(fewest)):
                fewest = missing
        detail = f"lacks {', '.join(fewest)}" if fewest else "holds none of them"
        raise self._refuse(f"{str(root)!r}, which {detail if root.is_dir() else 'is not a folder'}")

    def _path(self, folder: Path, name: str) -> Path | None:
        try:
            paths = (folder / f"{name}{suffix}" for suffix in self.suffixes)
            return next((path for path in paths if path.is_file()), None)
        except OSError as error:
            raise self._refuse(f"{str(folder)!r}: {error.strerror}") from None

    def _refuse(self, got: str) -> ConfigError:
        return ConfigError(
            f"`data.root` must be a folder that holds {self.wanted}, got {got}. {self.source}"
        )
