"""What the verbs share: numbers with their nouns."""

import pytest
import typer

from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import EXIT_SKIPPED
from latentvae.cli.session import Session, counted


def finish(skipped: list[dict[str, str]], done: int) -> None:
    session = Session()
    session.skipped += skipped
    session.finish(done)


def test_one_thing_is_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    skipped = [{"path": "a.png", "reason": "broken"}]
    with pytest.raises(LatentVAEError, match="the only image could not be read: broken"):
        finish(skipped, 0)
    with pytest.raises(LatentVAEError, match="none of the 2 images could be read; the first: broken"):
        finish(skipped * 2, 0)
    for number, words in ((1, "1 of 4 images was skipped"), (2, "2 of 5 images were skipped")):
        with pytest.raises(typer.Exit) as stop:
            finish(skipped * number, 3)
        assert stop.value.exit_code == EXIT_SKIPPED
        assert words in capsys.readouterr().err
