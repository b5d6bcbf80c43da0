"""What the tests of the trainer share."""

from pathlib import Path

import pytest

from syncnorm.train.checkpoint.store import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")
