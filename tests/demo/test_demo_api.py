"""What the page of the API shows to copy."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import textured
from demo_server import running, tiny_export
from PIL import Image

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file


def test_api_snippets_name_local_files_and_files_have_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_export(tmp_path), monkeypatch) as page, monkeypatch.context() as inside:
        inside.chdir(tmp_path)
        Image.fromarray(textured(48, 40, 3)).save("photo.jpg")
        client = Client(page.local_url, download_files=str(tmp_path / "downloads"), verbose=False)
        info = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
        assert len(info) == 9
        for name, endpoint in info.items():
            assert "http" not in str([each["example_input"] for each in endpoint["parameters"]]), name
            assert not [
                each["label"] for each in endpoint["returns"] if each["label"].startswith("value_")
            ], name
        # as the page of the API writes it: what must be given, with its example
        needed = {
            each["parameter_name"]: handle_file(each["example_input"]["url"])
            for each in info["/reconstruct"]["parameters"]
            if not each["parameter_has_default"]
        }
        assert list(needed) == ["photo"]
        assert client.predict(**needed, api_name="/reconstruct")[4]["width"] == 48
        with pytest.raises(TypeError, match="second"):  # and not the example's mirror image
            client.predict(first=handle_file("photo.jpg"), api_name="/interpolate")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_copied_lines_of_curl_give_what_the_page_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ('it\'s a, "photo".png', "other.png")
    for seed, name in enumerate(names):
        Image.fromarray(textured(48, 40, seed)).save(tmp_path / name)
    with running(tiny_export(tmp_path), monkeypatch) as page:
        events = {each["api_name"]: each for each in page.config["dependencies"]}
        parts = {each["id"]: each for each in page.config["components"]}

        def copied(endpoint: str, *values: Any) -> Any:
            """What the endpoint's lines print, as the page shows them for these values."""
            event = events[f"{endpoint}_pressed"]
            fn = page.fns[event["id"]].fn
            kinds = [parts[each]["type"] for each in event["outputs"]]
            labels = [parts[each]["props"].get("label") for each in event["outputs"]]
            assert kinds.count("code") in (1, 2)
            *_, shown = fn(None, *values)  # computes it too, as the page does
            lines = shown[labels.index("curl")].replace("http://127.0.0.1:7860", page.local_url.rstrip("/"))
            done = subprocess.run(
                ["sh", "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            assert "event: complete" in done.stdout, (lines, done.stdout, done.stderr)
            return shown, json.loads(done.stdout.rsplit("data: ", 1)[1])

        photo, other = (str(tmp_path / name) for name in names)
        shown, found = copied("reconstruct", photo, "tiny-model", "sample", 3)
        picture = np.asarray(Image.open(io.BytesIO(httpx.get(found[5]["url"]).content)))
        assert np.array_equal(picture, np.asarray(Image.open(shown[-2])))
        shown, found = copied("interpolate", photo, other, "tiny-model", 3, "linear")
        assert found[2]["positions"] == shown[-1]["positions"]
        shown, found = copied("compare", photo, "tiny-model", ["JPEG", "tiny-model"], 60)
        assert [row["psnr"] for row in found[1]] == [row["psnr"] for row in shown[-3]]
