"""Handlers as the page needs them: nothing twice, errors in their panel, copies of large pictures."""

import hashlib
import html
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from latentvae.demo.guard import refusing
from latentvae.demo.jobs import Stopped, stoppable


@dataclass(frozen=True)
class Copied:
    """What the page works on in place of an upload.

    Attributes:
        path: the upload's own, or its copy's.
        words: for the visitor; empty where nothing was copied.
        larger: how many times more pixels the upload has, if it can be had in full size; or 0.
        side: pixels of the copy's longer side; 0 where nothing was copied.
        size: the upload's width and height.
        peak_bytes: what it takes in full size; 0 where that is not known.
    """

    path: str | None
    words: str = ""
    larger: float = 0.0
    side: int = 0
    size: tuple[int, int] = (0, 0)
    peak_bytes: int = 0


def on_page(
    run: Callable[..., Any],
    inputs: int,
    empty: Sequence[Any],
    *,
    always: bool = False,
    shrink: Callable[[list[Any]], Copied] | None = None,
    snippets: Sequence[Callable[..., str]] = (),
) -> Callable[..., Any]:
    """A handler that leaves the page as it is where nothing is new, and says there what goes wrong.

    It takes what it saw last, then `run`'s arguments, and gives what it saw, a message, the button "full
    size", then `run`'s results: `empty` ones where an input is missing, or with an error. With `always` it
    runs whatever it saw. `shrink` puts copies into the list of arguments. Lines that `snippets` give come
    before the results.
    """

    before = [""] * len(snippets)  # of the results

    def live(seen: str | None, *values: Any) -> Iterator[Any]:
        shown = hashlib.sha256(json.dumps(values[:inputs]).encode()).hexdigest()  # masks are megabytes
        if not always and shown == seen:
            yield tuple(gr.skip() for _ in range(3 + len(before) + len(empty)))
            return
        if not always and any(value in (None, "", []) for value in values[:inputs]):
            yield (shown, *_notice(), *before, *empty)
            return
        try:
            with refusing():
                used = list(values)
                copied = shrink(used) if shrink else Copied(None)
                start = time.perf_counter()
                # always a generator itself, so that gradio treats both kinds of handlers alike
                results = run(*used) if inspect.isgeneratorfunction(run) else (run(*used) for _ in range(1))
                for result in stoppable(results):
                    # of inputs that are there
                    lines = [each(*values[:inputs], side=copied.side) for each in snippets]
                    part = None in result  # what fails after a part can be tried again
                    seconds = 0.0 if part else (time.perf_counter() - start) * copied.larger
                    said = _notice(copied.words, seconds, copied.peak_bytes)
                    yield (gr.skip() if part else shown, *said, *lines, *result)
        except Stopped as end:  # what was shown before stays, and can be asked for again
            said = _notice("Stopped.", kind="stopped") if end.asked else (gr.skip(), gr.skip())
            yield (gr.skip(), *said, *(gr.skip() for _ in (*before, *empty)))
        except gr.Error as error:
            # seen, or an upload, which browsers report twice, would be refused twice
            yield (shown, *_notice(error.message, kind="alert"), *before, *empty)

    # gradio counts a handler's parameters, and finds gr.Progress among their defaults
    names = inspect.signature(run).parameters.values()
    last = inspect.Parameter("seen", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    live.__signature__ = inspect.Signature([last, *names])  # type: ignore[attr-defined]
    return live


def _notice(
    words: str = "", seconds: float = 0.0, peak_bytes: int = 0, *, kind: str = "status"
) -> tuple[gr.HTML, gr.Button]:
    """The panel's message, or none; and the button "full size", where that would take so many seconds."""
    role = "alert" if kind == "alert" else "status"
    named = ' class="lv-stopped"' if kind == "stopped" else ""  # page.js looks for it
    said = f'<p role="{role}"{named}>{html.escape(words)}</p>' if words else ""
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    took += f" and {peak_bytes / 1e9:.1f} GB" if peak_bytes else ""
    return gr.HTML(said, visible=bool(words)), gr.Button(f"Full size, about {took}", visible=seconds > 0)
