"""A run's folder: making and finding it, its lock."""

import itertools
import json
import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

from syncnorm import system
from syncnorm.errors import ConfigError
from syncnorm.run.ending import read_exit
from syncnorm.train.checkpoint.same_run import describe_differences
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.schema import CHANGEABLE, Config
from syncnorm.train.config.section import is_url
from syncnorm.train.files import read_regular, regular, remove, write_text_whole
from syncnorm.train.storage import LOCAL_ROOT, read_origin, write_origin
from syncnorm.train.storage.fetch import check_not_behind, claim, disclaim, local_copy
from syncnorm.train.storage.mirror import open_mirror


def make_run_folder(config: Config, name: str, launch: str | None = None) -> Path:
    """Make a new folder `RUN_DIR/NAME-DATE-TIME` with the resolved configuration in it.

    Where `run_dir` is an address, the folder is `runs/NAME-DATE-TIME-HEX`, to be copied there.

    Args:
        config: of the run.
        name: of the configuration; a name in the configuration goes before.
        launch: identifies the launch, so that restarted workers find the folder.

    Raises:
        ConfigError: it cannot be made.
    """
    stem = f"{config.name or name}-{datetime.now():%Y%m%d-%H%M%S}"
    url = None
    if is_url(config.run_dir):
        # Many machines may begin a run there within a second; a few on this one.
        stem = f"{stem}-{secrets.token_hex(4)}"
        url = f"{config.run_dir.rstrip('/')}/{stem}"
        try:
            claim(url, _config_text(config))
        except ConfigError as error:
            raise ConfigError(f"`run_dir` cannot be used: {error}") from None
    root = local_root(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = next(path for path in _candidates(root, stem) if _is_new(path))
        if launch is not None:
            write_text_whole(folder / "launch.json", json.dumps({"launch": launch}) + "\n")
        write_config(config, folder)
        if url is not None:
            write_origin(folder, url)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"`run_dir` must be a folder that can be written to, got {str(root)!r}: {error}"
        ) from None
    return folder


def local_root(config: Config) -> Path:
    """Return the folder on this machine in which the run gets its own."""
    return LOCAL_ROOT if is_url(config.run_dir) else Path(config.run_dir)


def remove_unstarted(folder: Path) -> None:
    """Remove a new run's folder if the run was refused before it began."""
    if not (folder / "metrics.jsonl").exists():
        disclaim(folder)
        remove(folder)


def write_config(config: Config, folder: Path) -> None:
    """Write the resolved configuration, which makes a folder a run's folder."""
    write_text_whole(folder / "config.yaml", _config_text(config))


def _config_text(config: Config) -> str:
    return strict_yaml.dump(config.model_dump())


def upload_rest(folder: Path, config: Config) -> None:
    """Copy a run's folder to its address once more, if it has one, as the run's workers are gone.

    A fault is printed.
    """
    mirror = open_mirror(folder, config.checkpoint.keep, config.launch.patience_seconds)
    if mirror is None:
        return
    mirror.close()
    while not mirror.is_over(1.0):
        pass
    for fault in mirror.pop_faults():
        system.tell(f"syncnorm: {fault}")


def find_relaunched(config: Config, launch: str) -> Path | None:
    """Find the newest unfinished run of the same launch, whose workers are being restarted."""
    folders = []
    for note in local_root(config).glob("*/launch.json"):
        try:
            is_same = json.loads(read_regular(note)) == {"launch": launch}
        except (OSError, ValueError):
            continue
        end = read_exit(note.parent)
        if (
            is_same
            and (end is None or end.status != "done")
            and _is_same_config(config, note.parent)
        ):
            folders.append(note.parent)
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def check_resumable(config: Config, source: Path | str) -> Path:
    """Return the folder of a run if one with this configuration can resume in it.

    Args:
        config: of the run to be.
        source: the folder; or the address of a run, whose copy is made first.

    Raises:
        ConfigError: it is not a run's folder, or that run would have another result; or the store
            refuses.
    """
    folder = local_copy(source)
    if not is_url(str(source)):
        check_not_behind(folder)
    if read_origin(folder) is None and is_url(config.run_dir):
        raise ConfigError(
            "`run_dir` must stay a folder for a run that began in one, got "
            f"{config.run_dir!r}: {str(folder)!r} has no address that it is copied to"
        )
    recorded = _recorded(folder)
    if recorded is None:
        raise ConfigError(
            f"`--resume` must name a run's folder, got {str(folder)!r}, which has no readable "
            "config.yaml"
        )
    differences = describe_differences(config, recorded)
    if differences:
        raise ConfigError(
            f"`--resume` must name a run of the same configuration, got {str(folder)!r}, which "
            f"differs: {differences}. Only {', '.join(CHANGEABLE)} may change, and train.epochs may "
            "grow."
        )
    record = folder / "metrics.jsonl"
    if record.is_symlink() or (record.exists() and not record.is_file()):
        raise ConfigError(
            f"`--resume`: {str(record)!r} must be a file, which the run adds to, got a link, a "
            "folder or a pipe. Put a copy in its place, or nothing."
        )
    if is_url(str(source)):
        claim(str(source).rstrip("/"), (folder / "config.yaml").read_text(encoding="utf-8"))
    return folder


def lock(folder: Path, name: str = "run.lock") -> Any:
    """Lock a run's folder for as long as the returned file is open.

    Args:
        folder: of the run.
        name: of the file; Ray's driver has one of its own, since a worker of its takes the run's.

    Raises:
        ConfigError: another process has locked it, or it cannot be written.
    """
    try:
        file = os.fdopen(regular(folder / name, os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise ConfigError(
            f"run {str(folder)!r} must be writable, its {name} too: {error.strerror}"
        ) from None
    try:
        system.lock(file.fileno())
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{str(folder)!r} is being trained by another process. Stop that one first."
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        text = read_regular(folder / "config.yaml", follows_links=True).decode()
        recorded = strict_yaml.parse(text, "config.yaml")
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _is_same_config(config: Config, folder: Path) -> bool:
    recorded = _recorded(folder)
    return recorded is not None and not describe_differences(config, recorded)


def _candidates(root: Path, stem: str) -> itertools.chain[Path]:
    return itertools.chain(
        [root / stem], (root / f"{stem}-{number}" for number in itertools.count(2))
    )


def _is_new(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
