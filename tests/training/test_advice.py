"""What a run that cannot go on says to do is possible in the state that it leaves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentvae.base.errors import LatentVAEError
from latentvae.training import checkpoint, loop


@pytest.mark.parametrize("saved", [True, False])
def test_resume_is_advised_where_there_is_something_to_resume(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saved:
        (tmp_path / "step-00000002").mkdir()
    state = SimpleNamespace(step=3, bad_steps=5, vae=SimpleNamespace(state_dict=dict))
    run: Any = SimpleNamespace(
        state=state, checkpoints=tmp_path, config=SimpleNamespace(train=SimpleNamespace(max_bad_steps=5))
    )
    with pytest.raises(LatentVAEError) as not_finite:
        loop.check_finite(run)

    def fill(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fill)
    one: Any = SimpleNamespace(is_main_process=True, process_index=0, wait_for_everyone=lambda: None)
    with pytest.raises(LatentVAEError) as full:
        checkpoint.write_whole(state, tmp_path, {}, 2, one)  # type: ignore[arg-type]
    for caught in (not_finite, full):
        assert ("--resume latest" in str(caught.value)) is saved
        assert ("start again" in str(caught.value)) is not saved
