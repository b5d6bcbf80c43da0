"""Finding a data set's files under the folder that a configuration names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from syncnorm.errors import ConfigError


@dataclass(frozen=True)
class DataFiles:
    """Where a data set's files may lie under the root folder.

    Args:
        layouts: folders to look into, each with the files wanted there.
        endings: what may follow a file's name.
        wanted: the files, in words.
        origin: where they come from, in words.
    """

    layouts: Sequence[tuple[str, Sequence[str]]]
    endings: Sequence[str]
    wanted: str
    origin: str

    def find(self, root: Path | None) -> list[Path]:
        """Give the paths of the first layout that is complete, in its order.

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
            return next(
                (path for end in self.endings if (path := folder / (name + end)).is_file()), None
            )
        except OSError as error:
            raise self._refuse(f"{str(folder)!r}: {error.strerror}") from None

    def _refuse(self, got: str) -> ConfigError:
        return ConfigError(
            f"`data.root` must be a folder that holds {self.wanted}, got {got}. {self.origin}"
        )
